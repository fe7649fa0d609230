"""The web explorer: what a model looks at, a click at a time."""
