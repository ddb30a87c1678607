"""The command line: ``longctx <command> [key=value ...]``."""
