"""The published figures: which command made each, the record it left, and the pages they are written into.

python -m evidence --list
python -m evidence budgets --inputs FOLDER
python -m evidence --write
python -m evidence --check --inputs FOLDER
"""
