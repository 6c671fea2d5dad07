"""The traced graph in one spelling: one operator for each linear and attention, no writes, aliases known."""
