"""Tables, figures and a page, from records only."""
