"""Devices, ranks and sharded weights."""
