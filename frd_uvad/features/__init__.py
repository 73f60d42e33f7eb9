"""Clip features as they are published and as this toolkit writes them, and their labels."""
