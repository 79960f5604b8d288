"""The soup: which ingredients may be averaged, the recipes, and the page that shows them."""
