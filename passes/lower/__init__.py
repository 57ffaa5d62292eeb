"""Q, DQ and integer weights into the graph."""
