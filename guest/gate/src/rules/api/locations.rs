//! All places of the API where a client can name something, for tests that try each.

use super::{Body, Route, Shape, Text, routes};

/// A step from a JSON value to a value in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A field of a structure.
    Field(&'static str),
    /// An element of a list.
    Element,
    /// A value of a map, under any key.
    Value,
    /// A key of a map. Always the last step.
    Key,
}

/// The part of a request that holds a string.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A parameter.
    Parameter(&'static str),
    /// A string in the body.
    Body(Vec<Step>),
}

/// A string that a route takes.
#[derive(Clone, Debug)]
pub struct Location {
    /// The row.
    pub route: &'static Route,
    /// The part of the request.
    pub place: Place,
    /// The meaning of the string.
    pub kind: Text,
}

/// Returns every string of every route's parameters and body.
pub fn locations() -> impl Iterator<Item = Location> {
    routes().flat_map(|route| {
        let parameters = route.parameters.iter();
        let mut found: Vec<Location> = parameters
            .map(|parameter| Location { route, place: Place::Parameter(parameter.name), kind: parameter.kind })
            .collect();
        if let Body::Json(shape) = route.body {
            collect(route, *shape, &mut Vec::new(), &mut found);
        }
        found
    })
}

/// Adds the strings of a shape. The recursion ends because shapes are static data without cycles.
fn collect(route: &'static Route, shape: Shape, steps: &mut Vec<Step>, found: &mut Vec<Location>) {
    let mut below = |step, shape: Shape| {
        steps.push(step);
        collect(route, shape, steps, found);
        steps.pop();
    };
    match shape {
        Shape::Object(groups) => {
            for (name, shape) in groups.iter().flat_map(|group| group.iter()) {
                below(Step::Field(name), *shape);
            }
        }
        Shape::Map(keys, values) => {
            below(Step::Key, Shape::Text(keys));
            below(Step::Value, *values);
        }
        Shape::List(element) => below(Step::Element, *element),
        Shape::Words(kind) => below(Step::Element, Shape::Text(kind)),
        Shape::Text(kind) => found.push(Location { route, place: Place::Body(steps.clone()), kind }),
        Shape::Integer | Shape::Unsigned(_) | Shape::Float | Shape::Bool => {}
    }
}
