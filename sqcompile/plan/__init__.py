"""Recipe: what the user asks for. Plan: what was decided, checked and saved."""
