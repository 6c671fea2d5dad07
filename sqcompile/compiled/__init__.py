"""emit: the lowered graph becomes a module, through Inductor or as it is; its stages and its report."""
