"""The graph in the form that every later pass expects; float, provably equal."""
