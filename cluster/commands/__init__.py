"""The subcommands of `baton`: each module adds its flags with `add_parser` and runs with `run`."""
