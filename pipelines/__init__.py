"""Recipes, flows, evaluation, reports: the only package that uses both `meteora` and `store`."""
