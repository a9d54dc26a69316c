def tables(*a): return []
def markdown(t): return ""
