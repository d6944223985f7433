"""The subcommands of `lumi`: options and a call. Each imports what it needs when it is called."""
