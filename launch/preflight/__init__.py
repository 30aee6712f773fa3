"""The doctor: what is wrong with this machine or cluster, said before step 0.

`examination.py` is the whole of it on one page. It uses `probes.py`, what is looked at on one node, and `limited.py`, which lets nothing
take for ever; `site.py`, where a run is going to be; `meeting.py`, where nodes meet; `processes.py` and `devices.py`, what is measured by
one process for each device (`__main__.py`); `comparison.py`, which sets the nodes side by side; and `report.py`, what is said at the end.
"""
