def write(out,tok): pass
