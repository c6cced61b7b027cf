//! What a template's values may come to.
//!
//! A value can be large without having cost anything: a list that holds another one twice, a few dozen times
//! over, is a few dozen small lists and 2^60 elements to whoever walks it, as printing, comparing, hashing and
//! writing JSON do. The engine counts steps and bytes, not what an element holds. So every list and every map
//! that a template makes is wrapped together with its weight, the nodes that a walk of it meets; and what
//! walks a value pays for its weight before it begins.
//!
//! Both happen in the program that the template was compiled to: `bounded` puts a filter and tests of ours beside
//! the instructions that make and walk values. (Tests, because the engine charges text by its length whenever a filter
//! sees it.)

#![forbid(unsafe_code)]

use minijinja::machinery::{Instruction, Instructions};
use minijinja::value::{DynObject, Enumerator, Object, ObjectRepr, Value};
use minijinja::{Environment, Error, ErrorKind, State};
use std::fmt;
use std::sync::Arc;

/// No template can name them: they are no identifiers.
const WEIGH: &str = "=weigh";
const BARE: &str = "=bare";
const INNER: &str = "=inner";
const WALK: &str = "=walk";
const WALKS: &str = "=walks";
const CALLED: &str = "=called";

/// Nodes that a value may come to, and their nesting: what walks it anew for a message of an error has an end.
const HEAVIEST: u64 = 1 << 20;
const DEEPEST: u32 = 1 << 14;
/// Nodes walked for a step.
const NODES_PER_STEP: u64 = 4;
/// Bytes of text that weigh as much as a node.
const BYTES_PER_NODE: u64 = 16;

/// Filters and tests whose time does not depend on what their arguments hold.
const CHEAP_FILTERS: [&str; 5] = ["length", "count", "default", "d", "first"];
const CHEAP_TESTS: [&str; 14] = [
    "defined",
    "undefined",
    "none",
    "boolean",
    "number",
    "integer",
    "int",
    "float",
    "string",
    "sequence",
    "mapping",
    "iterable",
    "true",
    "false",
];

/// A list or a map and its weight. All that it holds is plain or weighed itself.
struct Weighed {
    object: DynObject,
    weight: u64,
    depth: u32,
}

impl fmt::Debug for Weighed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.object, f)
    }
}

impl Object for Weighed {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        self.object.repr()
    }
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.object.get_value(key)
    }
    fn get_value_by_str(self: &Arc<Self>, key: &str) -> Option<Value> {
        self.object.get_value_by_str(key)
    }
    fn enumerate(self: &Arc<Self>) -> Enumerator {
        self.object.enumerate()
    }
    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        self.object.enumerator_len()
    }
    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.object.render(f)
    }
}

/// What has a weight, and what may be put into lists, maps and namespaces.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    /// A variable, an argument: here a namespace or a loop may stand.
    Outer,
    /// A part of another value, which must not change any more.
    Inner,
}

/// Counts what is looked at, and takes its price out of the fuel.
struct Meter<'a> {
    state: Option<&'a State<'a, 'a>>,
    nodes: u64,
}

impl Meter<'_> {
    fn node(&mut self) -> Result<(), Error> {
        self.nodes += 1;
        match self.state {
            Some(state) if self.nodes.is_multiple_of(NODES_PER_STEP) => state.consume_fuel(1),
            _ => Ok(()),
        }
    }
}

fn refused(why: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, why.to_owned())
}

fn kind_of(object: &DynObject) -> &'static str {
    object.type_name().rsplit("::").next().unwrap_or_default()
}

/// `value` with every list and map in it weighed, and its weight and depth.
fn weighed(
    value: &Value,
    place: Place,
    depth: u32,
    meter: &mut Meter<'_>,
) -> Result<(Value, u64, u32), Error> {
    let plain = |weight| Ok((value.clone(), weight, 0));
    if let Some(text) = value.as_str() {
        return plain(1 + text.len() as u64 / BYTES_PER_NODE);
    }
    let Some(object) = value.as_object() else {
        return plain(1 + value.as_bytes().map_or(0, <[u8]>::len) as u64 / BYTES_PER_NODE);
    };
    if let Some(known) = value.downcast_object_ref::<Weighed>() {
        return Ok((value.clone(), known.weight, known.depth));
    }
    if object.repr() == ObjectRepr::Plain {
        return plain(1);
    }
    let kind = kind_of(object);
    // They change, and their owner may be put into them.
    let opaque = matches!(kind, "Namespace" | "Loop" | "KwargsValues");
    if opaque && place == Place::Inner {
        return Err(refused("a namespace or a loop cannot be a part of another value"));
    }
    if depth == DEEPEST {
        return Err(refused("a value is nested without end"));
    }
    let (mut weight, mut deepest, mut changed) = (1_u64, 0, false);
    let mut part = |part: &Value| -> Result<Value, Error> {
        meter.node()?;
        let place = if kind == "KwargsValues" { Place::Outer } else { Place::Inner };
        let (new, its_weight, its_depth) = weighed(part, place, depth + 1, meter)?;
        changed |= new.as_object().is_some() && part.downcast_object_ref::<Weighed>().is_none();
        weight = weight.saturating_add(its_weight);
        deepest = deepest.max(its_depth + 1);
        if weight > HEAVIEST {
            return Err(refused("a value grows beyond all bounds"));
        }
        if deepest > DEEPEST {
            return Err(refused("a value is nested without end"));
        }
        Ok(new)
    };
    let new = if object.repr() == ObjectRepr::Map {
        let mut pairs = Vec::new();
        for key in value.try_iter()?.checked() {
            let key = key?;
            pairs.push((part(&key)?, part(&value.get_item(&key)?)?));
        }
        changed.then(|| Value::from_pairs(pairs))
    } else {
        let mut items = Vec::new();
        for item in value.try_iter()?.checked() {
            items.push(part(&item?)?);
        }
        (changed || object.repr() == ObjectRepr::Iterable).then(|| Value::from(items))
    };
    if opaque {
        return Ok((value.clone(), weight, deepest));
    }
    let object = new.as_ref().and_then(Value::as_object).unwrap_or(object).clone();
    let value = Value::from_object(Weighed { object, weight, depth: deepest });
    Ok((value, weight, deepest))
}

/// A value as a template may have it.
///
/// # Errors
/// It is too large.
pub(super) fn outside(value: &Value) -> Result<Value, Error> {
    Ok(weighed(value, Place::Outer, 0, &mut Meter { state: None, nodes: 0 })?.0)
}

fn weigh(state: &State, value: Value) -> Result<Value, Error> {
    Ok(weighed(&value, Place::Outer, 0, &mut Meter { state: Some(state), nodes: 0 })?.0)
}

/// Whether `value` has yet to be weighed.
fn bare(value: &Value) -> bool {
    value.as_object().is_some_and(|object| object.repr() != ObjectRepr::Plain)
        && value.downcast_object_ref::<Weighed>().is_none()
}

/// Refuses what cannot be a part of another value.
fn inner(state: &State, value: &Value) -> Result<bool, Error> {
    weighed(value, Place::Inner, 0, &mut Meter { state: Some(state), nodes: 0 })?;
    Ok(true)
}

fn weight(state: &State, value: &Value) -> Result<u64, Error> {
    Ok(weighed(value, Place::Outer, 0, &mut Meter { state: Some(state), nodes: 0 })?.1)
}

/// Takes the price of walking `value` once.
fn walk(state: &State, value: &Value) -> Result<bool, Error> {
    state.consume_fuel(weight(state, value)? / NODES_PER_STEP)?;
    Ok(true)
}

/// Takes the price of walking every value of a list once.
fn walks(state: &State, values: &Value) -> Result<bool, Error> {
    let mut sum = 0_u64;
    for value in values.try_iter()? {
        sum = sum.saturating_add(weight(state, &value)?);
    }
    state.consume_fuel(sum / NODES_PER_STEP)?;
    Ok(true)
}

/// Takes the price of a call: that it walks its further arguments for each node of the first.
fn called(state: &State, values: &Value) -> Result<bool, Error> {
    let (mut first, mut further) = (None, 1_u64);
    for value in values.try_iter()? {
        let its_weight = weight(state, &value)?;
        match first {
            // A format names its arguments in three bytes.
            None => {
                first = Some(value.as_str().map_or(its_weight, |text| 1 + text.len() as u64 / 4))
            }
            Some(_) => further = further.saturating_add(its_weight - 1),
        }
    }
    state.consume_fuel(first.unwrap_or(0).saturating_mul(further) / NODES_PER_STEP)?;
    Ok(true)
}

/// Adds what [`bounded`] calls.
pub(super) fn add_to(environment: &mut Environment<'_>) {
    environment.add_filter(WEIGH, weigh);
    environment.add_test(BARE, bare);
    environment.add_test(INNER, inner);
    environment.add_test(WALK, walk);
    environment.add_test(WALKS, walks);
    environment.add_test(CALLED, called);
    // They print all there is, and how deep it lies as spaces.
    environment.remove_global("debug");
    environment.remove_filter("pprint");
}

/// A compiled template that pays for what it walks.
///
/// # Errors
/// A constant that is too large.
pub(super) fn bounded<'a>(program: &Instructions<'a>) -> Result<Instructions<'a>, Error> {
    // A test of ours on the topmost value, which stays.
    let test = |name| {
        [Instruction::DupTop, Instruction::PerformTest(name, Some(1), !0), Instruction::DiscardTop]
    };
    // The same on the topmost values as a list; their number lies on top of them then.
    let listed = |count, name| {
        let mut steps = vec![Instruction::BuildList(count)];
        steps.extend(test(name));
        steps.push(Instruction::UnpackLists(1));
        steps
    };
    let fixed = |count, name| {
        let mut steps = listed(Some(count), name);
        steps.push(Instruction::DiscardTop);
        steps
    };
    let below = |name| {
        let mut steps = vec![Instruction::Swap];
        steps.extend(test(name));
        steps.push(Instruction::Swap);
        steps
    };
    let many = |count: &Option<u16>| count.map(usize::from);
    let (mut places, mut made) = (Vec::new(), Vec::new());
    let mut at = 0;
    while let Some(instruction) = program.get(at) {
        places.push(made.len() as u32);
        let mut add = |instruction| made.push((at, instruction));
        let before = match instruction {
            Instruction::Eq
            | Instruction::Ne
            | Instruction::Gt
            | Instruction::Gte
            | Instruction::Lt
            | Instruction::Lte
            | Instruction::CompareAndPreserve(_)
            | Instruction::GetItem
            | Instruction::Emit => test(WALK).into(),
            Instruction::In | Instruction::StringConcat => {
                let mut steps = below(WALK);
                steps.extend(test(WALK));
                steps
            }
            Instruction::SetAttr(_) => below(INNER),
            Instruction::Slice => fixed(4, WALKS),
            Instruction::BuildMap(pairs) if *pairs > 0 => fixed(2 * pairs, WALKS),
            Instruction::MergeKwargs(count) => fixed(*count, WALKS),
            Instruction::ApplyFilter(name, count, _) if !CHEAP_FILTERS.contains(name) => {
                listed(many(count), CALLED)
            }
            Instruction::PerformTest(name, count, _) if !CHEAP_TESTS.contains(name) => {
                listed(many(count), CALLED)
            }
            Instruction::CallFunction(_, count) if *count != Some(0) => listed(many(count), CALLED),
            Instruction::CallMethod(_, count) | Instruction::CallObject(count) => {
                listed(many(count), CALLED)
            }
            _ => Vec::new(),
        };
        let counted = !before.is_empty();
        before.into_iter().for_each(&mut add);
        add(match instruction {
            Instruction::ApplyFilter(name, _, id) if counted => {
                Instruction::ApplyFilter(name, None, *id)
            }
            Instruction::PerformTest(name, _, id) if counted => {
                Instruction::PerformTest(name, None, *id)
            }
            Instruction::CallFunction(name, _) if counted => Instruction::CallFunction(name, None),
            Instruction::CallMethod(name, _) => Instruction::CallMethod(name, None),
            Instruction::CallObject(_) => Instruction::CallObject(None),
            // Lists and maps of constants are one themselves.
            Instruction::LoadConst(value) => Instruction::LoadConst(outside(value)?),
            other => other.clone(),
        });
        match instruction {
            Instruction::Slice
            | Instruction::BuildMap(_)
            | Instruction::BuildList(_)
            | Instruction::BuildTuple(_)
            | Instruction::Add
            | Instruction::Mul
            | Instruction::ApplyFilter(..)
            | Instruction::CallFunction(..)
            | Instruction::CallMethod(..)
            | Instruction::CallObject(_) => {
                add(Instruction::DupTop);
                add(Instruction::PerformTest(BARE, Some(1), !0));
                // To the next instruction, as all jumps here by its number in the old program.
                add(Instruction::JumpIfFalse(at + 1));
                add(Instruction::ApplyFilter(WEIGH, Some(1), !0));
            }
            _ => {}
        }
        at += 1;
    }
    places.push(made.len() as u32);
    let mut result = Instructions::new(program.name(), program.source());
    for (at, mut instruction) in made {
        match &mut instruction {
            Instruction::Iterate(to)
            | Instruction::Jump(to)
            | Instruction::JumpIfFalse(to)
            | Instruction::JumpIfFalseOrPop(to)
            | Instruction::JumpIfTrueOrPop(to)
            | Instruction::BuildMacro(_, to, _) => *to = places[*to as usize],
            _ => {}
        }
        match program.get_line(at) {
            Some(line) => result.add_with_line(instruction, line as u16),
            None => result.add(instruction),
        };
    }
    Ok(result)
}
