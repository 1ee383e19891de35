//! What makes types of the schema from Rust's.

/// An object: each field with the name of its member. A field whose type is an `Option` may be left out.
#[macro_export]
macro_rules! qapi_struct {
    ($(#[$about:meta])* $vis:vis struct $name:ident {
        $($(#[$field_about:meta])* $field:ident: $type:ty = $member:literal,)*
    }) => {
        $(#[$about])*
        #[derive(Clone, Debug)]
        $vis struct $name {
            $($(#[$field_about])* pub $field: $type,)*
        }

        impl $crate::qapi::Qapi for $name {
            fn parse(input: $crate::qapi::Input<'_>) -> Result<Self, $crate::qapi::QmpError> {
                $crate::qapi::parse_object(input)
            }

            fn emit(&self) -> Option<serde_json::Value> {
                Some($crate::qapi::emit_object(self))
            }

            fn describe(schema: &mut $crate::qapi::Schema) -> String {
                schema.object::<Self>(std::any::type_name::<Self>())
            }
        }

        impl $crate::qapi::Object for $name {
            fn take(members: &mut $crate::qapi::Members<'_>) -> Result<Self, $crate::qapi::QmpError> {
                Ok(Self { $($field: members.take($member)?,)* })
            }

            fn put(&self, map: &mut serde_json::Map<String, serde_json::Value>) {
                $(if let Some(value) = $crate::qapi::Qapi::emit(&self.$field) {
                    map.insert($member.to_owned(), value);
                })*
            }

            fn list(schema: &mut $crate::qapi::Schema) -> Vec<$crate::qapi::Member> {
                vec![$($crate::qapi::Member {
                    name: $member.to_owned(),
                    kind: <$type as $crate::qapi::Qapi>::describe(schema),
                    optional: <$type as $crate::qapi::Qapi>::absent().is_some(),
                },)*]
            }
        }
    };
}

/// One of several words.
#[macro_export]
macro_rules! qapi_enum {
    ($(#[$about:meta])* $vis:vis enum $name:ident {
        $($(#[$word_about:meta])* $variant:ident = $word:literal,)*
    }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        $vis enum $name {
            $($(#[$word_about])* $variant,)*
        }

        impl $name {
            /// The word for it.
            $vis fn word(self) -> &'static str {
                match self { $(Self::$variant => $word,)* }
            }
        }

        impl $crate::qapi::Qapi for $name {
            fn parse(input: $crate::qapi::Input<'_>) -> Result<Self, $crate::qapi::QmpError> {
                let word: String = $crate::qapi::Qapi::parse(input)?;
                match word.as_str() {
                    $($word => Ok(Self::$variant),)*
                    other => Err(input.not_accepted(other)),
                }
            }

            fn emit(&self) -> Option<serde_json::Value> {
                Some(self.word().into())
            }

            fn describe(schema: &mut $crate::qapi::Schema) -> String {
                schema.choice(std::any::type_name::<Self>(), &[$($word),*])
            }
        }
    };
}

/// An object whose member `tag` says which others it has.
#[macro_export]
macro_rules! qapi_union {
    ($(#[$about:meta])* $vis:vis enum $name:ident by $tag:literal {
        $($(#[$case_about:meta])* $variant:ident($type:ty) = $word:literal,)*
    }) => {
        $(#[$about])*
        #[derive(Clone, Debug)]
        $vis enum $name {
            $($(#[$case_about])* $variant($type),)*
        }

        impl $crate::qapi::Qapi for $name {
            fn parse(input: $crate::qapi::Input<'_>) -> Result<Self, $crate::qapi::QmpError> {
                $crate::qapi::parse_object(input)
            }

            fn emit(&self) -> Option<serde_json::Value> {
                Some($crate::qapi::emit_object(self))
            }

            fn describe(schema: &mut $crate::qapi::Schema) -> String {
                schema.union(std::any::type_name::<Self>(), $tag, |schema| {
                    let tag = schema.choice(
                        concat!(module_path!(), stringify!($name), "tag"),
                        &[$($word),*],
                    );
                    let base = vec![$crate::qapi::Member {
                        name: $tag.to_owned(),
                        kind: tag,
                        optional: false,
                    }];
                    let cases = vec![$((
                        $word.to_owned(),
                        <$type as $crate::qapi::Qapi>::describe(schema),
                    ),)*];
                    (base, cases)
                })
            }
        }

        impl $crate::qapi::Object for $name {
            fn take(members: &mut $crate::qapi::Members<'_>) -> Result<Self, $crate::qapi::QmpError> {
                let word: String = members.take($tag)?;
                match word.as_str() {
                    $($word => Ok(Self::$variant(<$type as $crate::qapi::Object>::take(members)?)),)*
                    other => Err($crate::qapi::QmpError::generic(format!(
                        "Parameter '{}' does not accept value '{other}'", $tag
                    ))),
                }
            }

            fn put(&self, map: &mut serde_json::Map<String, serde_json::Value>) {
                match self {
                    $(Self::$variant(inner) => {
                        map.insert($tag.to_owned(), $word.into());
                        $crate::qapi::Object::put(inner, map);
                    })*
                }
            }

            fn list(_: &mut $crate::qapi::Schema) -> Vec<$crate::qapi::Member> {
                unreachable!("a union describes itself as a whole")
            }
        }
    };
}
