"""Where records come from: files, built-in tasks, mixtures drawn from either."""
