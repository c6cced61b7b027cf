# find_package(nybl): nybl::nybl is the shared library, nybl::static the static one, each if it is installed.
# This file lies three folders below the prefix: lib/cmake/nybl or share/cmake/nybl.
get_filename_component(_nybl_prefix "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
set(_nybl_folders "${_nybl_prefix}/lib" "${_nybl_prefix}/lib64" "${_nybl_prefix}/lib/${CMAKE_LIBRARY_ARCHITECTURE}")

find_path(_nybl_include nybl.h PATHS "${_nybl_prefix}/include" NO_DEFAULT_PATH NO_CACHE REQUIRED)
find_library(_nybl_shared NAMES libnybl.so libnybl.dylib PATHS ${_nybl_folders} NO_DEFAULT_PATH NO_CACHE)
find_library(_nybl_static NAMES libnybl.a PATHS ${_nybl_folders} NO_DEFAULT_PATH NO_CACHE)

if(_nybl_shared AND NOT TARGET nybl::nybl)
    add_library(nybl::nybl SHARED IMPORTED)
    set_target_properties(nybl::nybl PROPERTIES
        IMPORTED_LOCATION "${_nybl_shared}"
        INTERFACE_INCLUDE_DIRECTORIES "${_nybl_include}")
endif()
if(_nybl_static AND NOT TARGET nybl::static)
    add_library(nybl::static STATIC IMPORTED)
    set(_nybl_system "")
    if(NOT APPLE AND NOT ANDROID)
        set(_nybl_system m pthread dl)
    elseif(ANDROID)
        set(_nybl_system m dl)
    endif()
    set_target_properties(nybl::static PROPERTIES
        IMPORTED_LOCATION "${_nybl_static}"
        INTERFACE_INCLUDE_DIRECTORIES "${_nybl_include}"
        INTERFACE_LINK_LIBRARIES "${_nybl_system}")
endif()

if(NOT TARGET nybl::nybl AND NOT TARGET nybl::static)
    set(nybl_FOUND FALSE)
    set(nybl_NOT_FOUND_MESSAGE "no libnybl below ${_nybl_prefix}")
endif()
