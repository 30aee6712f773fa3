"""Text goes in; token shards and one manifest come out. `pretrain/` reads only shards, manifest and tokenizer."""
