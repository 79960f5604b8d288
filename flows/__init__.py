"""Sentences made of tasks: retrain, finetune, soup, approve. They know nouns and tasks, and import neither torch nor mlflow."""
