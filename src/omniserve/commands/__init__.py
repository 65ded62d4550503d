"""One module for each command of `omniserve`: `add_parser(commands)` declares its flags and what runs it."""
