"""The kinds of models that bnfold serves."""
