"""Reports as pages and pictures: the only package that imports matplotlib, and only where something is drawn."""
