"""The commands of `python -m dse`, one module each: the docstring's first line is the help, `main(argv)` runs it."""
