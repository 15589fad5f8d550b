"""One file per subcommand of ``cpvit``: build the inputs, call the library, print what came back."""
