"""Preference data from anywhere: formats, chats, sources, forensics."""
