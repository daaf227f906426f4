"""Methods that cut visual tokens between decoder layers."""
