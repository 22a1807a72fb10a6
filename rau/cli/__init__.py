"""The commands of ``python -m rau``, a module each: they parse, call and print.

A command's ``add_parser(subparsers)`` declares its options; its ``run`` takes them and returns the exit status, 0 where all
is good, 1 where the verdict is bad. What it raises as a RauError, ImportError or OSError is told in a line, exit status 2.
"""
