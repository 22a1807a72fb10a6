"""The commands of ``python -m rau``, one file each.

A command's module has ``add_parser(subparsers)``, which declares its options and sets ``run``, a function from the
parsed arguments to the exit status: 0 good, 1 the verdict is bad, 2 wrong usage or a named backend missing.
"""
