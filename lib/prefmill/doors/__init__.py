"""Ways in for people who use other tools: their trainers' interfaces, their configuration files."""
