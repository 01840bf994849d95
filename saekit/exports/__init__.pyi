from .lists import make_list as make_list
from .naming import NeuronpediaName as NeuronpediaName
from .naming import quick_list_url as quick_list_url
