"""What `rm-scale data` found, for people: a page, lines for a terminal, and the files."""
