"""What may be decided: precisions, units of layers, bit configurations."""
