"""The commands of `rm-scale`, one thin module each: options, then a call; heavy imports only inside `run`."""
