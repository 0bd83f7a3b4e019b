"""How survivors are chosen (criteria) and what is done about the error (mitigations), as data for the operators."""
