"""plan: which linears and attentions run in INT8, with which scales. Analyses; no graph is changed."""
