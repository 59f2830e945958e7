"""Pictures of a decode: `frames` turns a traced answer into a `Replay`, `terminal` and `page` draw it."""
