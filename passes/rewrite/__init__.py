"""fold and insert_qdq: a plan goes into the graph. Each gives a new graph."""
