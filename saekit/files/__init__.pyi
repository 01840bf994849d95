from .names import hidden_name as hidden_name
from .storage import parse_json as parse_json
