"""How a list of operators is executed. Knows no model: operators, their order, the executor, the trace."""
