"""The checklist: its items and the engines that answer them."""
