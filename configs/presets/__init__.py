"""Published ways to decode, one file each: `djax generate --preset NAME`, `djax.generate(..., **djax.preset("NAME"))`.

A preset is a method, so it says nothing of gen_length, which is the task's. djax does not guess where a publication is
silent: each file names its source.
"""
