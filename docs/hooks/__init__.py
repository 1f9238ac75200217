"""What the site adds as it is built (`make docs`): the reference, the notebook, drawings, links, a check."""
