"""Real clients, installed and driven against a real server: `python -m tests.clients` runs them.

Not collected by pytest: they are large, they come from package registries, and each takes seconds.
"""
