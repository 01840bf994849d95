from .fits import check_fits as check_fits
from .fits import doubts_of_fit as doubts_of_fit
from .fits import model_name_of as model_name_of
