"""Pipeline schedules, one file each: the file name is the public name.

A file holds ``ALIASES`` (other spellings, lower case) and ``build(pp, vpp, num_microbatches,
microbatch_group_size) -> Schedule``.
"""
