"""Recipes, flows, evaluation, reports: the only package that knows both model and store."""
