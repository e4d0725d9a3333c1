"""The commands of `python -m dse`, a module each: a docstring whose first line is the help, and main(argv)."""
