"""What rewritten graphs are made of: formulas, operators of our own, tables of codes; and how they are spelt out."""
