"""x"""
def render(table, about): return "<html></html>"
