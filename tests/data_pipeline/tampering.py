"""For tests of manifests that somebody changed and sealed again."""

import pytest

from configs.errors import UserError
from configs.sealed import seal, unseal
from data_pipeline.manifest import load_manifest


def update(place, changes):
    """A change of a mapping inside the manifest; None: the key is taken away."""

    def change(found):
        for key in place:
            found = found[key]
        found |= changes
        for key in [key for key, value in changes.items() if value is None]:
            del found[key]

    return change


def assert_refused(folder, change, what):
    """That a dataset's manifest, changed by `change`, is none, for the reason `what`."""
    found = unseal((folder / "manifest.json").read_bytes())
    change(found)
    (folder / "manifest.json").write_bytes(seal(found))
    with pytest.raises(UserError, match=rf"manifest.json: not a manifest \((splits.train: )?{what}"):
        load_manifest(folder)
